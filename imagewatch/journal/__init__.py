"""What is recorded: attempts and charges, reasons to wait, and what commands ask for.

It promises that what cannot be recorded is not paid, that caps count every request that was or may have been charged,
and that a ledger which was deleted, replaced or damaged is noticed before the next request.

The modules, in the order in which they are read::

    journal  Journal: what was claimed, sent, paid and decided; the right to send
    job_rows what it has of jobs
    ledger   Ledger: questions about attempts and charges
    opening  the journal that a configuration names
    database what it needs of a database
    row      rows of jobs and attempts
    schema   its tables in SQLite, and how those of an earlier version are updated
    sqlite   its file: opened when it is used, known again
    files    its files in the state folder; the errors about them
    health   whether the ledger of a daemon can be used, for other processes
    budget   Budget: caps on credits, requests in a minute
    books    what the budget asks of the journal
    prices   what a request may cost, from earlier charges
    holds    Holds: why nothing is sent, and until when
    account  holds that concern all daemons of a shared account, and these daemons
    events   what is to be notified, each event in the transaction of what it reports
    requests what commands ask of a daemon, and the holds that last over a restart
    control  the file that wakes the daemon for them
    postgres the shared database, in the place of SQLite's file
    forgetting what happens to the jobs of a daemon that does not come back
    moving   moves the journal of a stopped daemon between its state folder and a shared database
    lost_rows  what a shared database has lost, written again
    common   one inbox that several daemons process: who scans it, who has which job
    counted  how many attempts a daemon has recorded in a shared database
    earlier  jobs that an earlier version has left in files
"""
