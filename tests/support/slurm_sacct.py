"""`sacct` without a database: answers from the controller's records of jobs, which it keeps for a while.

    sacct -o JobID,State,NodeList --parsable2 -j 12 -j 13_1

Other flags are taken and change nothing; of a job there is one row, none for its steps.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

FIELDS = {
    "JobID": "JobId",
    "JobIDRaw": "JobId",
    "JobName": "JobName",
    "State": "JobState",
    "NodeList": "NodeList",
    "ExitCode": "ExitCode",
    "Restarts": "Restarts",
    "Reason": "Reason",
    "Partition": "Partition",
    "Submit": "SubmitTime",
    "Start": "StartTime",
    "End": "EndTime",
    "Elapsed": "RunTime",
}
"""What sacct calls it, and what scontrol calls it."""


def records(job: str) -> list[dict[str, str]]:
    """The controller's records of a job, or of all of an array."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return [
        dict(re.findall(r"(\w[\w:/]*)=(\S*)", line))
        for line in answer.stdout.splitlines()
        if "JobId=" in line
    ]


def job_id(record: dict[str, str]) -> str:
    """The id as sacct writes it: `12`, `12_3` or `12_[4-7]`."""
    if "ArrayJobId" not in record:
        return record["JobId"]
    task = record.get("ArrayTaskId", "")
    return f"{record['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"


def row(record: dict[str, str], columns: list[str]) -> str:
    values = {column: record.get(FIELDS.get(column, ""), "") for column in columns}
    values |= {"JobID": job_id(record)}
    if values.get("NodeList") in ("(null)", ""):
        values["NodeList"] = "None assigned"
    return "|".join(values[column] for column in columns)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-j", "--jobs", action="append", default=[])
    parser.add_argument("-o", "--format", default="JobID,State,NodeList")
    parser.add_argument("-n", "--noheader", action="store_true")
    flags, _ = parser.parse_known_args()
    columns = [column.partition("%")[0] for column in flags.format.split(",")]
    lines = [] if flags.noheader else ["|".join(columns)]
    for job in (job for jobs in flags.jobs for job in jobs.split(",")):
        lines += [row(record, columns) for record in records(job)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
