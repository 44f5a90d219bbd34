import pytest

from tests.experiments import jpeg_sets


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    """A folder with ``imagenet2012`` prepared: 15 train images and 5 of validation of each of jpeg_sets.CLASSES."""
    folder = tmp_path_factory.mktemp("imagenet")
    jpeg_sets.prepare_imagenet(folder)
    return str(folder)
