"""Processes that measure: what hangs, crashes or goes wrong."""

import pytest

from benchmarks.processes import Measuring

ANSWERS = """
import os, time
from benchmarks.processes import serve

def answer(request):
    match request["do"]:
        case "answer": return {"got": request["text"]}
        case "fail": raise MemoryError("no room | " + 1000 * "x")
        case "hang": time.sleep(60)
        case "crash": os._exit(3)

serve(answer)
"""


def test_answers_errors_crashes_and_hangs(tmp_path):
    (tmp_path / "answers.py").write_text(ANSWERS)
    process = Measuring("answers", tree=tmp_path)
    assert process.ask({"do": "answer", "text": "x" * 200_000}) == {"got": "x" * 200_000}
    failed = process.ask({"do": "fail"}, seconds=60)["error"]
    assert failed.startswith("MemoryError: no room / xxx")
    assert len(failed) == 300
    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        process.ask({"do": "hang"}, seconds=0.3)
    process.close()
    process = Measuring("answers", tree=tmp_path)
    with pytest.raises(RuntimeError, match="ended with 3"):
        process.ask({"do": "crash"}, seconds=60)
    process.close()
