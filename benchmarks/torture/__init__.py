"""Everything that can happen to a toolkit's files, machines and processes, on purpose: `make torture`.

    damage       damaged and hostile files of every kind the product reads, in their thousands
    kills        SIGKILL at random times and before chosen file operations
    disk         a full disk at every writer
    environment  locale, HOME, streams, permissions, descriptors, memory, umask
    concurrency  threads and forks on one session, two commands on one target
    halting      a sample's answer against the same sample's in other company

Each part is seeded and bounded, and each finding comes with the command that repeats it.  `__main__` runs the parts, keeps
what is done so that a stopped run goes on, and writes the record.
"""
