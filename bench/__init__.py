"""Microbenchmarks of marquardt: `python -m bench`, or `pytest bench` for everything pytest-benchmark offers.

    protocol   how a row is measured: correctness gate, warm-up, interleaved rounds, medians
    peers      the same mathematics as its users write it today, and `torch.compile` of that
    floors     the times this machine cannot beat, measured in the same rounds
    bench_*    the suites: each says which rows it has, and what each row has to reach
    plugin     how a row becomes a pytest-benchmark test
    machine    what the numbers were measured on
    table      the rows for people

A new suite is a file `bench_<family>.py` with `rows(device, full) -> list[Row]` and

    def test_row(row, measure):
        measure(row)
"""
