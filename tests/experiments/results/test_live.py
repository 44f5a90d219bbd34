import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from experiments import report
from experiments.results import live
from tests.pages import Page

ROOT = Path(__file__).parents[3]


def write_run(folder, epochs):
    """The folder of a run that goes on."""
    folder.mkdir(exist_ok=True)
    config = {"dense": True, "seed": 0, "data": {"name": "digits"}, "method": {"name": "sparse_momentum"}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": 10 * n, "epoch": n, "train_loss": 1 / n, "density": 1.0} for n in range(1, epochs + 1)]
    # The last line is being written.
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step"')


def ask(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.status, answer.read().decode()


@pytest.mark.slow
def test_a_page_follows_the_runs(tmp_path, monkeypatch):
    drawn = []
    real = live.page.report
    monkeypatch.setattr(live.page, "report", lambda *args, **options: drawn.append(1) or real(*args, **options))
    with live.make_server(live.Live([tmp_path], "Now & here"), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        with pytest.raises(urllib.error.HTTPError, match="503") as nothing:
            ask(address)
        with nothing.value as answer:
            text = answer.read().decode()
        assert "is not the folder of a run, nor is one in it" in Page(text).text
        assert "setTimeout(look, 1000 * 5)" in text  # it will be there
        write_run(tmp_path / "one", 2)
        status, text = ask(address)
        assert (status, Page(text).tables[0][1][:3]) == (200, ["one", "dense", "not finished, epoch 2"])
        assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in text
        write_run(tmp_path / "one", 3)
        write_run(tmp_path / "two", 1)
        text = ask(f"{address}?again")[1]
        assert [row[2] for row in Page(text).tables[0][1:]] == ["not finished, epoch 3", "not finished, epoch 1"]
        assert "Now & here" in Page(text).text
        assert ask(address)[1] == text
        assert len(drawn) == 2  # not a third time: nothing has changed
        (tmp_path / "two/config.json").write_text("{")
        with pytest.raises(urllib.error.HTTPError, match="503") as broken:
            ask(address)
        with broken.value as answer:
            assert "two/config.json is not JSON" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(f"{address}one/config.json")
        with pytest.raises(
            OSError, match=f"--port={server.server_port}: Address already in use; --port=0 takes a free"
        ):
            live.make_server(live.Live([tmp_path], ""), server.server_port)
        server.shutdown()


@pytest.mark.slow
def test_the_command_line_serves_until_ctrl_c(tmp_path):
    write_run(tmp_path / "one", 1)
    command = [sys.executable, "-m", "experiments.report", "--serve", str(tmp_path), "--port=0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    ) as process:  # fmt: skip
        try:
            said = process.stdout.readline()
            address = re.match(r"(http://127\.0\.0\.1:\d+) shows the runs; Ctrl-C ends it\n", said)[1]
            assert "not finished, epoch 1" in ask(address)[1]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert not list(ROOT.glob("report.html"))


def test_flags_that_do_not_go_together(tmp_path, capsys):
    for flags, message in (
        (["--serve", f"--out={tmp_path}/page.html"], "--out has no effect with --serve"),
        (["--port=8001"], "--port has no effect without --serve"),
    ):
        with pytest.raises(SystemExit):
            report.main([str(tmp_path), *flags])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: there is no folder '.*none'"):
        report.main(["--serve", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="error: --port=70000: .*; --port=0 takes a free one"):
        report.main(["--serve", str(tmp_path), "--port=70000"])
