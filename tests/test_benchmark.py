from tests.benchmarks import overhead


def test_the_benchmark_prints_every_row(capsys):
    sizes = {"steps": 8, "repeats": 2, "trainer-steps": 2, "trainer-repeats": 1, "growth-steps": 1500}
    overhead.main([f"--{name}={size}" for name, size in sizes.items()])
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")}
    assert {*overhead.WAYS, *overhead.LOGGED} <= rows
    assert {"hand-written sum in a local variable", "hand-written sums in a dict", "appending to lists"} <= rows
    assert "1,000 steps" in out
    assert "1,500 steps" in out
    assert "32 keys" in out
    for library in ("python", "torch", "pytorch-lightning", "torchmetrics", "epoch-mixin"):
        assert f"{library} " in out.splitlines()[0]
    assert out.count("epoch-mixin ") >= 5
    assert "times loss.detach().clone()" in out
    assert out.count("Within Trainer.fit, it costs") == 1 + len(overhead.LOGGED)
