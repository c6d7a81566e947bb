"""Running steps on a device that works while the host prepares the next one."""
