from benchmarks.logprob_memory import Shape, memory, summary


def test_summary_by_hand() -> None:
    """A head of 1,024 x 256 fp32 weights is 1 MiB, and logits of 512 positions are 2 MiB."""
    shape = Shape(vocabulary=1024, hidden=256, context=512)
    assert (shape.head_mib, shape.logits_mib) == (1.0, 2.0)
    found = summary(shape, {"model": 10.0, "head": 12.5})
    assert (found["model_mib"], found["head_mib"], found["head_ratio"]) == (10, 12, 1.15)


def test_memory_is_that_of_this_process() -> None:
    assert 0 < memory("VmRSS") <= memory("VmHWM")
