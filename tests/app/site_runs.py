"""Run folders of runs between sites, written without a run: a recipe, rounds' records, a journal, who is expected."""

import json
from pathlib import Path
from typing import Any

from fedrot.running.folder import RunFolder
from fedrot.running.network.journal import Exchange, FileJournal
from fedrot.running.recipe_file import parse_recipe

START = 1_767_614_400.0  # 2026-01-05 12:00:00 UTC
SCRIPT = "<script>document.title = 'taken'</script>"


def record(number: int, score: float = 0.5, **dropped: str) -> dict[str, Any]:
    """A round's record as rounds.py writes it."""
    scores = {"split": "validation", "examples": 5, "model": "global", "metric": "accuracy", "accuracy": score}
    scores |= {"macro_f1": score, "loss": 0.7, "worst": 0.4, "spread": 0.1, "by_client": {"books": 0.4}}
    used = sorted({"books", "films", "music"} - dropped.keys())
    return {
        "round": number,
        "clients": {"drawn": 3, "used": used, "dropped": dropped},
        "train": {"loss": 0.7, "rows": 10, "tokens": 100},
        "bytes": {"down": 1000, "up": 900},
        "evaluation": scores,
        "seconds": {"train": 1.0, "round": 1.5},
    }


def exchange(
    client: str, kind: str, round: int | None, time: float, refused: str | None = None, **more: Any
) -> Exchange:
    """A request that took two seconds, `time` seconds after the start."""
    size = (
        {"sent": 2_000_000, "received": 0 if refused else 1_000_000} if kind != "join" else {"sent": 0, "received": 0}
    )
    told = {"seconds": 2.0, "headers": 300, "answered": True, **size, **more}
    return Exchange(time=START + time, client=client, kind=kind, round=round, refused=refused, **told)


def simulated(path: Path, rounds: int = 2) -> Path:
    """A folder as a simulation leaves it after some of four rounds."""
    data = {"path": "no-data", "train": "train.csv"}
    values = {"name": "tiny", "rounds": 4, "local": {"steps": 1}, "data": data, "partition": {"clients": 3}}
    recipe = parse_recipe(values)
    folder = RunFolder(path)
    folder.create(recipe)
    folder.close()
    for number in range(rounds):
        folder.append_metrics(record(number, 0.5 + 0.1 * number))
    return path


def between_sites(path: Path) -> Path:
    """Two of four rounds. books answers; films is refused in round 1 with a reason that is hostile; music joins and is
    not heard again; poems is expected and was never there.
    """
    simulated(path, rounds=0)
    RunFolder(path).write_json("sites.json", {"run": "abc", "clients": ["books", "films", "music", "poems"]})
    journal = FileJournal(path)
    for place, client in enumerate(("books", "films", "music")):
        journal.add(exchange(client, "join", None, 1 + place))
    journal.add(exchange("poems", "join", None, 5, "gave no answer", answered=False, seconds=4.0, headers=200))
    for number in (0, 1):
        begin = 10.0 * (1 + number)
        journal.add(exchange("books", "train", number, begin + 1))
        journal.add(exchange("films", "train", number, begin + 2, SCRIPT if number else None))
        lost = {"answered": False, "seconds": 5.0, "headers": 150}
        journal.add(
            exchange(
                "music", "train", number, begin + 5, "gave no answer" if number else None, **(lost if number else {})
            )
        )
        journal.add(exchange("books", "evaluate", number + 1, begin + 7, seconds=0.5))
    RunFolder(path).append_metrics(record(0, 0.5))
    RunFolder(path).append_metrics(record(1, 0.6, films=SCRIPT, music="gave no answer"))
    return path


def append(path: Path, number: int, score: float) -> None:
    """A round more, as a run that goes on writes it."""
    FileJournal(path).add(exchange("books", "train", number, 10.0 * (1 + number)))
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(number, score)) + "\n")
