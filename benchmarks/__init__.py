"""Benchmarks: what attaching, training and serving cost, against other libraries and against the limit.

    make bench                                     everything, on the CPU: results/cpu.json and results/cpu.html
    python -m benchmarks [NAME ...] [--quick] [--device cuda] [--out FOLDER]
    python -m benchmarks.page                      the pages and docs/performance.md again, from the results

A benchmark is a file of this folder with a value `BENCHMARK`. Nothing else has to know of it: `python -m benchmarks` runs it,
the page and docs/performance.md show it, and tests/test_benchmarks.py runs it quickly.

    \"\"\"What ... costs, in one line: the title.

    How it is measured and how its figures are to be read, in paragraphs for people; they stand on the page and in the docs.
    \"\"\"

    @dataclass(frozen=True, kw_only=True)
    class Shape(LlamaShape):           # or of `Shape`, where the model is no Llama: `rounds` and `device` come with it
        rows: int

    def measure(shape: Shape) -> Result:         # JSON; `shape.model()` and `shape.ids()` are on `shape.device`
        took = shape.turns({"ours": turn, "theirs": turn})      # each `turn(clock)` measures `with clock("step"): ...`
        return {"ratio": ratios(took["ours"].seconds["step"], took["theirs"].seconds["step"]).to_json()}

    def tables(result: Result) -> list[Table]:   # of the result alone: `result["shape"]`, `["device"]`, and what `measure` returned
    def plots(result: Result) -> list[Plot]:     # `Bars` and `Curves`; may be left out

    BENCHMARK = Benchmark(full=Shape(rounds=15, ...), quick=Shape(rounds=2, ...), measure=measure, tables=tables, plots=plots)
                                                 # `gpu=Shape(...)` where a larger shape is the one to know of on a GPU

The quick shape is for tests: seconds, with no data, no network and no other environment. The full one of all benchmarks together
is to take less than twenty minutes on two cores.

`measure.py` has the clock and the turns, `shape.py` models and batches, `twins.py` the same methods in other libraries,
`benchmark.py` the value and what finds it, `store.py` the files, `plots.py` figures, `page.py` what people read. The clock
measures CPU time on a CPU and events on a GPU. What needs another environment lies in `peers/` and imports of these the
first two alone.
"""
