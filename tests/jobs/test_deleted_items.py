"""Lists of files and jobs whose items are deleted while a client reads them, page by page."""

from __future__ import annotations

from typing import Literal

import pytest

from sera_serve.jobs import Job, JobNotFound, TrainingFileNotFound
from sera_serve.jobs.records import Checkpoint, LastSteps, NewEvent, Reported
from support.job_platform import Platform


def end(platform: Platform, job: Job) -> None:
    """Finish a job, so that its file may be deleted and the job be forgotten."""
    platform.jobs.fail(job.id, "test", "it ends", None)
    platform.jobs.mark_cleared(job.id)


@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize("tenant", ["acme", None])
def test_a_client_deletes_each_file_as_it_goes(
    platform: Platform, order: Literal["asc", "desc"], tenant: str | None
) -> None:
    made = []
    for _ in range(5):
        job = platform.create("acme")
        end(platform, job)
        made.append(job.training_file)
    after, has_more, seen = None, True, []
    while has_more:
        page, has_more = platform.files.page(tenant, after, 2, order)
        for file in page:
            platform.files.delete(file.id, tenant)
        seen += [file.id for file in page]
        after = seen[-1]
    assert seen == (made if order == "asc" else made[::-1])
    # Files that came later are in their places still.
    later = platform.create("acme").training_file
    assert platform.files.page(tenant, seen[0], 2, order) == (
        ([], False) if order == "desc" else ([platform.files.get(later, None)], False)
    )


def test_a_deleted_file_is_no_place_in_the_list_of_another_tenant(platform: Platform) -> None:
    job = platform.create("acme")
    end(platform, job)
    platform.files.delete(job.training_file, "acme")
    with pytest.raises(TrainingFileNotFound) as other:
        platform.files.page("evil", job.training_file, 2)
    with pytest.raises(TrainingFileNotFound) as absent:
        platform.files.page("evil", "file-none", 2)
    assert other.value.message.replace(job.training_file, "X") == absent.value.message.replace("file-none", "X")
    assert other.value.param == absent.value.param == "after"


def test_the_last_places_of_each_tenant_are_known(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.jobs.cursors._MAX_KEPT", 2)
    files = {}
    for tenant in ("acme", "beta"):
        jobs = [platform.create(tenant) for _ in range(3)]
        for job in jobs:
            end(platform, job)
            platform.files.delete(job.training_file, None)
        files[tenant] = [job.training_file for job in jobs]
    for tenant, (oldest, *known) in files.items():
        with pytest.raises(TrainingFileNotFound):
            platform.files.page(tenant, oldest, 2)
        for file_id in known:
            assert platform.files.page(tenant, file_id, 2) == ([], False)


def test_a_job_that_is_forgotten_meanwhile_is_a_place_too(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.jobs.records._MAX_KEPT", 1)
    # An older one, which is not finished, and one of another tenant.
    oldest, forgotten, kept = (platform.create("acme") for _ in range(3))
    others = platform.create("beta")
    ends = Reported(1, LastSteps(), [], [Checkpoint(1, 1.0, None, {})])
    for job in (others, forgotten, kept):
        platform.jobs.advance(job.id, "running", NewEvent("runs"))
        platform.jobs.record_progress(job.id, ends)
        end(platform, job)
    page, has_more = platform.jobs.page("acme", None, 2)
    assert [job.id for job in page] == [kept.id, forgotten.id] and has_more
    platform.create("acme")
    with pytest.raises(JobNotFound):
        platform.jobs.get(forgotten.id, "acme")
    with platform.database.reading() as connection:
        for table in ("job_events", "job_checkpoints"):
            left = connection.execute(f"SELECT DISTINCT job FROM {table}").fetchall()
            assert {others.id, kept.id} <= {job for (job,) in left} and (forgotten.id,) not in left
    assert platform.jobs.get(others.id, "beta").is_finished
    for after in (forgotten.id, kept.id):
        page, has_more = platform.jobs.page("acme", after, 2)
        assert [job.id for job in page] == [oldest.id] and not has_more
    with pytest.raises(JobNotFound):
        platform.jobs.page("evil", forgotten.id, 2)
