"""DeepSpeed's configuration."""

import torch

from ergo_rl.learners.config import Dtype, LearnerConfig, OptimizerConfig
from ergo_rl.learners.deepspeed_engine import deepspeed_config


def test_deepspeed_config_by_hand() -> None:
    config = LearnerConfig(
        zero_stage=3, stage3_persistence_threshold=7, dtype=Dtype.BFLOAT16, optimizer=OptimizerConfig(max_grad_norm=0.5)
    )
    assert deepspeed_config(config) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_deepspeed_config_offloads_the_optimizer_where_asked() -> None:
    zero = deepspeed_config(LearnerConfig(offload_optimizer=True))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    assert "offload_optimizer" not in deepspeed_config(LearnerConfig())["zero_optimization"]
