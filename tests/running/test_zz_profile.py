from test_crashes import *
def test_p(deployment):
    there = deployment(*SHARED)
    alive, whole = there.play(["server"])
    print(whole["result"], len(alive.steps), [s for s in alive.steps if "gone" in s])
    import cProfile, pstats
    p = cProfile.Profile(); p.enable()
    for at in range(10, 160, 15): there.play(["server"], [at])
    p.disable()
    pstats.Stats(p).sort_stats("cumtime").print_stats(70)
    pstats.Stats(p).sort_stats("tottime").print_stats(25)
