import torch

from topk_ortho.training.stopwatch import Stopwatch


def test_seconds_add_up_by_name_until_they_are_read(monkeypatch):
    times = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch(torch.device("cpu"))
    for name in ("sae", "data", "sae"):
        with stopwatch.measure(name):
            pass
    assert stopwatch.read() == {"sae": 6.0, "data": 0.5}
    assert stopwatch.read() == {}


def test_a_gpu_is_timed_on_its_own_stream(monkeypatch):
    """Also one that is not the current GPU; its stream is told by its device here."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream="that of the current GPU"):
            self.stream = stream

        def synchronize(self):
            pass

        def elapsed_time(self, last):
            assert self.stream == last.stream == torch.device("cuda", 1)
            return 5.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: device)
    stopwatch = Stopwatch(torch.device("cuda", 1))
    for _ in range(2):
        with stopwatch.measure("sae"):
            pass
    assert stopwatch.read() == {"sae": 0.01}
