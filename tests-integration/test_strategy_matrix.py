"""Strategies with precisions, clipping and accumulation: as one process by hand, or refused."""

from __future__ import annotations

import json

import pytest
import strategy_matrix as here


def _try(worlds, name, cells):
    """Run some combinations, and compare with what the generated table says."""
    kept = json.loads(here.RECORD.read_text(encoding="utf-8"))[name]
    refused = {
        (each["precision"], each["accumulation"], each["clipping"]): each["why"]
        for each in kept["refused"]
    }
    ranks = here.STRATEGIES[name][2]
    answers = worlds(ranks).run("strategy_matrix:run_cells", "S9", name=name, cells=cells)
    for number, cell in enumerate(cells):
        outcome = here.judge(cell, [mine[number] for mine in answers])
        assert outcome.get("refused") == refused.get(cell), cell
        assert ("equal" in outcome) == here.declared(name, cell[0]), cell


@pytest.mark.parametrize("name", here.STRATEGIES)
def test_combinations_equal_one_process_or_are_refused_as_the_table_says(worlds, name):
    _try(worlds, name, here.diagonal(name))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", here.STRATEGIES)
def test_all_combinations_do(worlds, name):
    cells = here.all_cells()
    for first in range(0, len(cells), 6):
        _try(worlds, name, cells[first : first + 6])


def test_the_diagonal_meets_every_precision_and_every_way():
    for name in here.STRATEGIES:
        cells = here.diagonal(name)
        assert {cell[0] for cell in cells} == set(here.PRECISIONS)
        assert {cell[1:] for cell in cells} == set(here.WAYS)
