import os
import signal

import pytest

from experiments import train
from experiments.stopping import Stopped
from experiments.workdir import Workdir
from tests.experiments import jpeg_sets


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    """A folder with ``imagenet2012`` prepared: 15 train images and 5 of validation of each of jpeg_sets.CLASSES."""
    folder = tmp_path_factory.mktemp("imagenet")
    jpeg_sets.prepare_imagenet(folder)
    return str(folder)


@pytest.fixture
def stopped_and_resumed(monkeypatch):
    """Trains a run that is stopped by a signal after its ninth step, and goes on with it; its state at the end."""

    def train_twice(config, workdir):
        log = Workdir.log

        def stop(self, metrics):
            log(self, metrics)
            if metrics["step"] == 9:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Workdir, "log", stop)
            with pytest.raises(Stopped):
                train.train(config, workdir, quiet=True)
        return train.train(config, workdir, quiet=True)[0]

    return train_twice
