"""ssh to the hosts of a hostfile."""

# Never ask for a password, and end if the host does not answer: without ServerAlive, ssh never notices a dead link.
OPTIONS = {"BatchMode": "yes", "ConnectTimeout": "10", "ServerAliveInterval": "5", "ServerAliveCountMax": "3"}


def ssh_command(host: str, command: str) -> list[str]:
    """Return the command line that runs a shell command on a host."""
    return ["ssh", *(f"-o{name}={value}" for name, value in OPTIONS.items()), host, command]
