"""That the program that runs Optax's tests over our links runs; all of them: make test-optax."""

import pytest

from tests import optax_contract


def test_optax_tests_run_over_our_links(capsys):
    result = optax_contract.main(["-k", "preserve_dtype.*'(asni|reweighted_l1)'"])
    assert (result.testsRun, len(result.skipped), len(result.failures + result.errors)) == (4, 1, 0)
    assert f"left out: 1, {optax_contract.FLOAT32}" in capsys.readouterr().out


def test_an_optax_without_tests_says_where_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="comes without its tests.*make test-optax OPTAX=optax"):
        optax_contract.main([str(tmp_path)])
