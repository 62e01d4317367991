"""What holds for every module: it can be imported, and it unpickles nothing."""

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "fedrot"
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(SOURCE)], "fedrot.")
    if not module.name.endswith((".simulated",))  # needs the extra `ray`
)


def test_every_module_can_be_imported() -> None:
    """Together, in one process: what a package that ours need has dropped or forbids shows here."""
    assert len(MODULES) > 100
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *MODULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def unpickling(tree: ast.AST) -> Iterator[str]:
    """Imports and calls by which pickled bytes would be read."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (
                name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve")
            )
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("torch.load", "np.load", "numpy.load", "pandas.read_pickle"):
                yield called
            yield from (keyword.arg for keyword in node.keywords if keyword.arg == "allow_pickle")


def test_nothing_is_unpickled() -> None:
    found = {str(path): list(unpickling(ast.parse(path.read_text()))) for path in SOURCE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}
    assert list(unpickling(ast.parse("import pickle\nx = torch.load(p)\nnp.save(p, allow_pickle=True)"))) == [
        "pickle",
        "torch.load",
        "allow_pickle",
    ]
