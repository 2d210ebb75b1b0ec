"""A demo world that a CPU trains in minutes: generated scenes, and tiny models that are pretrained to point badly.

`scenes` and `dataset` make the questions, `tiny_model` makes a small Qwen2.5-VL, `targets`, `batches`, `supervised` and
`pretrain` teach it (docs/pretraining.md), `scores` measures what it can do.
"""
