"""The journal in PostgreSQL, which several daemons share.

It makes the same promises over all daemons of an account as SQLite does for one. psycopg is imported only here.

The modules, in the order in which they are read::

    schema    its tables, and the views that show a daemon the rows that concern it
    place     which database, account, inbox and instance
    session   one connection: its settings, queries in our spelling, rows
    checks    whether a server can be used: durability, version of the tables, no pooler
    faults    the errors
    presence  reports that a daemon runs, and receives notifications about its account
    tables    creates and updates the tables
    converting  values of SQLite as its columns can hold them
    sums      compares what follows from attempts in both stores
    copying   copies a journal from SQLite and back
    database  PostgresDatabase: one thread commits what all threads write
"""
