"""What several files of tests between sites share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from network_faults import Known, known_run


@pytest.fixture(scope="module")
def known(
    tiny_recipe: Callable[[], dict[str, Any]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Known:
    return known_run(tiny_recipe(), tiny_data, tmp_path_factory.mktemp("known"))
