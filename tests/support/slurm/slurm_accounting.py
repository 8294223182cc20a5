"""Accounting for a test's Slurm cluster: a MariaDB that has no port, and the slurmdbd in front of it."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

from support.slurm.slurm_config import Addresses, host_name
from support.slurm.slurm_processes import ClusterError

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb-admin", "sacct")


class Accounting:
    """The commands of the daemons, and the files that they need, in the cluster's folder."""

    def __init__(self, folder: Path) -> None:
        self.data, self.socket = folder / "db", folder / "db.sock"
        self._folder = folder

    def make_database(self) -> None:
        """Make the database's own tables. Raises ClusterError."""
        command = ["mariadb-install-db", *self._options, "--skip-test-db"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"mariadb-install-db: {done.returncode}: {done.stderr.strip()[-500:]}")

    def database_command(self) -> list[str]:
        """Without accounts: whoever reaches the socket in this folder may do everything."""
        alone = ["--skip-networking", "--skip-grant-tables", f"--socket={self.socket}"]
        # slurmdbd complains of less
        waits = ["--innodb-lock-wait-timeout=900", "--max-allowed-packet=16M"]
        return ["mariadbd", *self._options, *alone, *waits, f"--pid-file={self._folder}/mariadbd.pid"]

    def database_answers(self) -> bool:
        command = ["mariadb-admin", "--no-defaults", f"--socket={self.socket}", "ping"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    @property
    def _options(self) -> list[str]:
        return ["--no-defaults", f"--datadir={self.data}", f"--user={_user()}", "--innodb-log-file-size=8M"]

    @property
    def environment(self) -> dict[str, str]:
        """What slurmdbd must have to find the database: its configuration has no word for a socket."""
        return {"MYSQL_UNIX_PORT": str(self.socket)}

    def write_config(self, addresses: Addresses) -> None:
        """Write slurmdbd.conf, which must be readable by its user alone."""
        path = self._folder / "slurmdbd.conf"
        path.touch(0o600)
        lines = [
            "AuthType=auth/munge",
            f"AuthInfo=socket={self._folder}/munge.sock",
            f"DbdHost={host_name()}",
            f"DbdAddr={addresses.controller}",
            f"DbdPort={addresses.accounting_port}",
            f"SlurmUser={_user()}",
            f"LogFile={self._folder}/log/slurmdbd.log",
            f"PidFile={self._folder}/slurmdbd.pid",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
        ]
        path.write_text("\n".join([*lines, ""]))


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name
