"""The configuration: one TOML file, the environment over it, and the API key.

It promises that a ``Config`` is complete and checked, that all problems are reported together, and that no key is
shown.

The modules, in reading order::

    schema    the sections and their keys, types, defaults and bounds
    load      reads a file and the environment; the only entry point
    draft     checks each section and makes its paths absolute
    tables    the tables of the file with the environment over them, and the origin of each value
    values    what makes a single value unusable; folders that overlap
    dsn       the connection to a shared database, in which no password may be
    shared    names of this daemon and its inbox in a shared database
    validate  checks a table against a struct; also for the front matter of prompts
    locate    where a configuration is searched, and whose file is used
    example   config.example.toml as the text of a new configuration
    secret_file  reads a small file that has a secret
    key       where the API key comes from, and a value that does not show itself
"""
