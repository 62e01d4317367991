"""`fedrot compare RECIPE --methods fedit,fedrot --seeds 0,1,2 [--sweep method.strength=0,.4,1]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fedrot.app.cli.advice import AGAIN, advising
from fedrot.app.cli.parser import CommandParser
from fedrot.core.errors import FedrotError, choices

DESCRIPTION = """\
Run a recipe with several methods and seeds: same splits, batches, first adapter and head for every method. Runs that
have finished are kept, one that was interrupted goes on. Keys of the recipe can be given as options too."""


@advising(AGAIN)
def main(words: Sequence[str]) -> int:
    """Run what is not there yet; print the table."""
    parser = CommandParser(prog="fedrot compare", description=DESCRIPTION)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument(
        "--methods", default="fedit,fedrot", help="names with commas between; settings by colons: fedrot:strength=1"
    )
    parser.add_argument("--seeds", default="0", help="whole numbers with commas between (default: 0)")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V", help="also vary a key, e.g. method.strength=0,.4,1"
    )
    parser.add_argument("--baseline", help="the row that others are compared with (default: fedit, or the first)")
    parser.add_argument(
        "--target", type=float, help="score for 'rounds to target' (default: the baseline's, when last scored)"
    )
    parser.add_argument("--small", action="store_true", help="the reduced run that the recipe describes under small:")
    parser.add_argument("--out", type=Path, help="folder of the comparison (default: runs/NAME-compared)")
    call, flags = parser.parse_known_args(list(words))
    from fedrot.app.compare.plan import plan, read_seeds, read_variants
    from fedrot.app.compare.run import run_all, summarise
    from fedrot.app.progress import make_watcher

    variants = read_variants(call.methods, call.sweep)
    names = list(dict.fromkeys(variant.method for variant in variants))
    baseline = call.baseline or ("fedit" if "fedit" in names else names[0])
    if baseline not in names:
        raise FedrotError(f"--baseline: there is no method {baseline!r} here; choose {choices(names)}")
    seeds = read_seeds(call.seeds)
    planned = plan(call.recipe, flags, variants, seeds, call.out, call.small, parser.own)
    out = planned[0].folder.parents[1]
    failed = run_all(planned, lambda text: print(text, file=sys.stderr, flush=True), make_watcher)
    found = summarise(planned, baseline, call.target, failed, out)
    print(found.table, end="")
    print(
        f"target {found.metric} {found.target:.4f}; mean ± standard deviation over {len(seeds)} seeds; "
        "[95 % interval, paired]"
    )
    for name, reason in found.failed.items():
        print(f"failed: {name}: {reason}")
    for name in ("table.csv", "runs.csv"):
        print(f"{name:<9}  {out / name}")
    print(f"report     {found.report}")
    return 0
