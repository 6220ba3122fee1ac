"""How the tests are spread over several workers."""

import workers


def test_as_many_workers_as_compilers_but_not_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(workers.torch.cuda, "is_available", lambda: False)
    assert [workers.num_workers({"MAX_JOBS": jobs}) for jobs in ("1", "2", "3", "16")] == [0, 2, 3, 4]
    monkeypatch.setattr(workers.torch.cuda, "is_available", lambda: True)
    assert workers.num_workers({"MAX_JOBS": "16"}) == 0


def test_builds_on_workers_share_the_jobs():
    assert workers.jobs_of_a_build({"MAX_JOBS": "5"}) == 5
    on_worker = {"PYTEST_XDIST_WORKER": "gw1"}
    assert [workers.jobs_of_a_build(on_worker | {"MAX_JOBS": jobs}) for jobs in ("1", "2", "5")] == [1, 1, 2]


def test_builds_come_first_and_the_rest_in_order(request):
    items = request.session.items
    first = workers.builds_first(items)
    assert set(first) == set(items)
    builds = [item for item in items if "compilers" in item.fixturenames]
    assert len({item.path for item in builds}) <= workers.NUM_BUILDS  # a file's tests run one after the other
    assert first == builds + [item for item in items if "compilers" not in item.fixturenames]
