from experiments.results import collect


def test_experiments_differ_by_more_than_the_seed():
    one = {"seed": 0, "epochs": 3, "masks_from": "runs/first/seed_0/sparse.safetensors", "data_dir": "here"}
    other = {"seed": 1, "epochs": 3, "masks_from": "runs/first/seed_1/sparse.safetensors", "data_dir": "there"}
    assert collect.experiment(one) == collect.experiment(other)
    taught = [run | {"distill_from": f"runs/dense/seed_{run['seed']}"} for run in (one, other)]
    assert collect.experiment(taught[0]) == collect.experiment(taught[1])
    assert collect.experiment(one) != collect.experiment(other | {"epochs": 4})
    assert collect.experiment(one) != collect.experiment(other | {"masks_from": one["masks_from"]})


def test_runs_are_found_in_natural_order_and_once(tmp_path):
    for name in ("b/seed_10", "b/seed_2", "a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    paths = collect.find_runs([tmp_path / "a", tmp_path, tmp_path / "link"])
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["a", "b/seed_2", "b/seed_10"]
    assert collect.short_names(paths) == ["a", "b/seed_2", "b/seed_10"]
    assert collect.short_names(paths[:1]) == ["a"]
