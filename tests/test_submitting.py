"""Which resources of a pipeline's jobs can be named; that jobs are sent is tested on a real Slurm (test_slurm.py)."""

import pytest

from scripts.submit_pipeline import check_resources
from settings.tasks import STAGES


@pytest.mark.parametrize("task", ["default", *STAGES])
def test_every_task_that_a_stage_may_have_can_be_given_resources(task: str) -> None:
    check_resources({task: {"nodes": 2}}, [])


def test_a_name_that_is_neither_a_task_nor_a_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="'lable', no task and no stage of this pipeline. Did you mean 'label'"):
        check_resources({"lable": {}}, [])
