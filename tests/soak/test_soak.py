"""What the soak is made of, in its smallest form."""

import json
from pathlib import Path

import pytest

from tests.soak import __main__ as soak
from tests.soak import hostile, kills

DATE = "2026-01-01"


@pytest.mark.slow
def test_some_hostile_files(tmp_path):
    artifacts, checkpoints = hostile.Artifacts(tmp_path), hostile.HuggingFace(tmp_path)
    assert sum(artifacts.trial(number)["refused"] for number in range(40)) > 30
    assert sum(checkpoints.trial(number)["refused"] for number in range(20)) > 10


def test_what_counts_as_lost():
    def fail(error):
        raise error

    assert hostile.refused(lambda: fail(ValueError("the file is damaged")), (ValueError,))
    assert not hostile.refused(lambda: None, (ValueError,))
    with pytest.raises(KeyError):
        hostile.refused(lambda: fail(KeyError("another error")), (ValueError,))
    with pytest.raises(RuntimeError, match="a refusal that says nothing"):
        hostile.refused(lambda: fail(ValueError("bad")), (ValueError,))
    with pytest.raises(RuntimeError, match="reading took 1"):
        hostile.refused(lambda: bytearray(2 * hostile.MEMORY), (ValueError,))


def test_trials_are_made_once_and_those_that_failed_again(tmp_path, monkeypatch):
    log, made = tmp_path / "log.jsonl", []

    def attempt(number):
        made.append(number)
        if made == [0, 1]:
            raise RuntimeError("lost")
        return {"kills": 2}

    monkeypatch.setattr(soak, "attempts", lambda name, folder: [lambda n=n: attempt(n) for n in range(3)])
    monkeypatch.setitem(soak.ABOUT, "text", (3, "runs"))
    assert not soak.make("text", tmp_path, log, again=False)
    assert made == [0, 1, 2]
    assert not soak.make("text", tmp_path, log, again=False)
    assert made == [0, 1, 2]
    with log.open("a") as file:
        file.write('{"name": "text", "trial": 2')  # what was being written when it was ended
    assert [line.get("lost") for line in soak.lines_of(log).values()] == [None, "RuntimeError: lost", None]
    assert soak.make("text", tmp_path, log, again=True)
    assert made == [0, 1, 2, 1]
    assert soak.make("full disk", tmp_path, log, again=False)  # whose number shows only then
    assert soak.make("full disk", tmp_path, log, again=False)
    assert made == [0, 1, 2, 1, 0, 1, 2]


def test_the_page_counts_what_was_done_and_lost(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    monkeypatch.setattr(soak, "ABOUT", {name: (2 * bool(count), about) for name, (count, about) in soak.ABOUT.items()})

    def write(names):
        found = {"artifacts": {"refused": True}, "Hugging Face checkpoints": {"refused": False}}
        lines = [
            {
                "name": name,
                "trial": trial,
                "date": DATE,
                **found.get(name, {"ended": True} if "disk" in name else {"kills": 4}),
            }
            for name in names
            for trial in range(2)
        ]
        lines[0] = {"name": names[0], "trial": 0, "date": DATE, "lost": "RuntimeError: another end"}
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(list(soak.ABOUT))
    page = soak.page(log)
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[2:] for line in page.splitlines() if line.startswith("| ")}
    assert rows["resident"] == ["4 kills in 2 runs", "1 |"]
    assert rows["one of two processes"] == ["8 kills in 2 runs", "0 |"]
    assert rows["full disk"] == ["2 files, for 2 of which the run ended", "0 |"]
    assert rows["artifacts"] == ["2, 2 of them refused", "0 |"]
    assert rows["Hugging Face checkpoints"] == ["2, 0 of them refused", "0 |"]
    write([name for name in soak.ABOUT if name != "gated"])
    with pytest.raises(ValueError, match="trials are missing: gated has 0 of 2"):
        soak.page(log)


@pytest.mark.slow
def test_a_run_that_is_killed_and_one_whose_disk_is_full(tmp_path):
    found = kills.kinds(Path(tmp_path))
    assert kills.killed(found["text"], 0, 1)["kills"] == 1
    files = kills.files_written(found["full disk"])
    assert "result.json.*.part" in files
    number = files.index("metrics.jsonl") + 1
    assert kills.disk_full(found["full disk"], number, "metrics.jsonl") == {"file": "metrics.jsonl", "ended": True}
