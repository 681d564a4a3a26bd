"""One job, from its claim to its result file.

It promises that a request is sent only after it was recorded, that a request that may have been charged is never sent
again automatically, and that a job continues from its files after a crash: each step can be run again.

The modules, in the order in which they are read::

    rules        the state table: what is on the disk, and the step that follows
    worker       Worker: finds out what the disk shows, takes the step, repeats
    running      RunningJob: what this process knows of a job
    steps        what is done in each step
    sending      one attempt: recorded, sent, and what is known of it afterwards
    common_steps what is done besides if other daemons process the same inbox
    completion   how a job ends: its result, its decision and its result file
    rows         the rows of a job's attempts
    receipts     the text of receipt and error file
    result_files receipts and error files read back
    lost_jobs    jobs that a shared database has lost, found in the folders
    redelivery   prompts that a sync tool delivers again
    outcome      the result of running a job, for the daemon
    record       the job record: the row of a job in the journal, and the files of its responses
    spool        Spool: the files of all jobs; which jobs are unfinished
    folders      all folders of one daemon: opened, locked, tested
    claims       the folder of claimed files, known by its inode
    common_folder what a common inbox needs of its file system, tried out; whose inbox it is
    two_hosts    two hosts that try out a common inbox together
    handover     what daemons of one inbox leave for each other in claim folders
    originals    dropped files: out of the inbox into a claim, and back
    delivery     results and originals into outbox, errors and archive
    earlier      jobs that an earlier version has left in the state folder
"""
