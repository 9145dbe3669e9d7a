"""Locating that was killed goes on with what it has, to the last bit."""

import pytest
import torch
from conftest import tiny_llama
from sweeps import few, same, scores_of
from torch import Tensor

from allo_fast.config import UserError
from allo_fast.locating import sweep as sweeping
from allo_fast.locating.files import StoredScore, finished, load_passes, save_pass, stored_scores
from allo_fast.locating.windows import Piece, square_windows

WINDOWS, SQUARES, PARTS = 5, 2, 2  # and with them passes for the norm, and micro-batches whose states are kept


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, Tensor]:
    return scores_of(few(tiny_llama(), tmp_path_factory.mktemp("straight"), windows=WINDOWS))


def files(folder) -> dict[str, int]:
    """When each whole file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def killed_after(folder, count: int) -> None:
    """Once so many files are whole, in the middle of what comes next."""
    running = few(tiny_llama(), folder, windows=WINDOWS).run()
    for _ in running:
        if len(files(folder)) == count:
            break
    running.close()
    assert len(files(folder)) == count


@pytest.mark.parametrize("count", range(1, PARTS + SQUARES + WINDOWS))
def test_killed_after_any_file_with_another_number_of_windows_asked(tmp_path, expected, count):
    killed_after(tmp_path, count)
    (tmp_path / "score-004.rank-0-of-1.safetensors.partial").write_bytes(b"torn")
    before = files(tmp_path)
    sweep = few(tiny_llama(), tmp_path, windows=7)
    progress = list(sweep.run())
    assert same(scores_of(sweep), expected) and len(sweep.windows) == WINDOWS
    assert before.items() <= files(tmp_path).items(), "what was finished is not made again"
    left = SQUARES + WINDOWS - max(0, count - PARTS)
    assert progress[-1] == (left * 2 + PARTS,) * 2, "two micro-batches a pass, and those whose states are kept"


def test_what_is_complete_is_not_computed_again(tmp_path, expected):
    scores_of(few(tiny_llama(), tmp_path, windows=WINDOWS))
    again = few(tiny_llama(), tmp_path, windows=WINDOWS)
    again.logps = again.compute = None
    assert list(again.run()) == [] and same(scores_of(again), expected)
    assert again.state_bytes["accumulators"] == 16 * max(sum(p.size for p in window) for window in again.windows)


def test_passes_for_the_norm_that_were_cut_otherwise_are_made_again(tmp_path, expected, monkeypatch):
    """As by another number of ZeRO-3 ranks, which may give as many passes."""
    plain = square_windows
    monkeypatch.setattr(sweeping, "square_windows", lambda windows, *given: plain(windows, 2))
    first = few(tiny_llama(), tmp_path, windows=WINDOWS)
    running = first.run()
    while not any("squares" in name for name in files(tmp_path)):
        next(running)
    running.close()
    monkeypatch.setattr(sweeping, "square_windows", plain)
    second = few(tiny_llama(), tmp_path, windows=WINDOWS)
    assert len(first.square_windows) == len(second.square_windows) and first.square_windows != second.square_windows
    assert same(scores_of(second), expected)


def test_the_states_that_were_kept_are_those_of_the_first_sessions_windows(tmp_path, expected):
    """More windows would begin where nothing was kept."""
    killed = few(tiny_llama(), tmp_path, windows=2).run()
    next(killed)
    killed.close()
    assert same(scores_of(few(tiny_llama(), tmp_path, windows=7)), expected)


def test_a_pass_counts_once_all_of_its_ranks_have_left_a_file(tmp_path):
    piece, numbers = Piece("a", 0, 10), torch.arange(10.0)
    for world in (2, 4):
        for rank in range(world):
            if (rank, world) == (1, 2):
                continue  # was killed
            share = piece.share(rank, world)
            save_pass(tmp_path, "score", 0, {share: numbers[share.begin : share.end]}, rank, world)
            assert bool(finished(tmp_path, "score")) == (rank == 3)
    assert set(load_passes(tmp_path, "score")) == {piece.share(rank, 4) for rank in range(4)}
    (score,) = stored_scores(tmp_path, {"a": 10}).values()
    assert torch.equal(score.part(0, 10), numbers)


@pytest.mark.parametrize("begin, end", [(0, 9), (0, 4), (3, 5), (4, 9), (5, 6)])
def test_parts_are_read_from_wherever_they_lie(tmp_path, begin, end):
    numbers = torch.arange(9.0)
    pieces = [Piece("a b", 4, 8), Piece("a b", 0, 4), Piece("a b", 8, 9), Piece("a b", 9, 9), Piece("c", 0, 2)]
    for number, piece in enumerate(pieces):
        save_pass(tmp_path, "score", number, {piece: numbers[piece.begin : piece.end]})
    scores = stored_scores(tmp_path, {"a b": 9, "c": 2})
    assert isinstance(scores["a b"], StoredScore) and scores["a b"].numel() == 9
    assert torch.equal(scores["a b"].part(begin, end), numbers[begin:end])


def test_scores_of_which_some_are_missing_are_refused(tmp_path):
    """As where the file that says how many windows there are was changed: others would move into their places."""
    save_pass(tmp_path, "score", 0, {Piece("a", 0, 3): torch.ones(3), Piece("a", 4, 5): torch.ones(1)})
    with pytest.raises(UserError, match="does not hold the scores of all of a; remove it"):
        stored_scores(tmp_path, {"a": 5})


def test_scores_that_are_all_zero_are_refused(tmp_path):
    save_pass(tmp_path, "score", 0, {Piece("a", 0, 3): torch.zeros(3), Piece("a", 3, 4): torch.zeros(1)})
    with pytest.raises(UserError, match="locate.score: every score is zero"):
        stored_scores(tmp_path, {"a": 4})
