"""The export benchmark at its smallest size: what it prints is there and makes sense."""

from test_benchmarks import number, on_linux, read_tables, run


@on_linux
def test_both_ways_of_the_export_have_their_times_and_memory():
    ways, layers = read_tables(run("export.py", "--smallest"))
    assert list(ways) == ["plain: load all, merge_and_unload", "merge_adapter"]
    for merge, _, rest, whole, _, megabytes, _ in ways.values():
        assert abs(number(whole) - number(merge) - number(rest)) < 0.11
        assert number(rest) > 0 and number(megabytes) > 0
    ours = ways["merge_adapter"]
    for cell, bar in ((ours[1], 0.8), (ours[4], 1), (ours[6], 0.35)):
        kept = "ok" if number(cell) <= bar else "MISSED"
        assert cell.endswith(f"(bar {bar}: {kept})")
    assert list(layers) == ["4", "8"]
