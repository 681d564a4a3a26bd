"""The commands of ``imagewatch``: one file per command, imported when that command is called.

``main`` turns an error that a command raises into a message, a next step and an exit code. A command that ends without
an error may exit with a code of its own (``status`` with 69 while the queue is on hold); see ``system/exits``.
Nothing that other people wrote reaches a terminal unescaped.

The modules, in reading order::

    main            the group: table of commands, errors to exit codes
    run             the daemon
    once            the daemon on what is in the inbox now
    foreground      what run and once share
    progress        the progress bar of once and demo
    submit          drop prompts and wait for their results; again
    batch           submit --table: which rows are dropped, and what is printed about them
    table           a CSV file as columns and rows
    template        a text with fields
    table_rows      rows become prompts with names
    row_record      which rows were dropped into a folder
    row_states      what has become of them
    expected_cost   what prompts may cost before they are dropped
    finished        a finished prompt, for again
    drop            images and prompt into the inbox, in the right order
    wait            which receipts and error files belong to dropped prompts
    results         what submit prints
    mcp             the folder for agents without a shell
    mcp_server      its tools, and the library of the protocol
    mcp_answers     what the tools answer
    named_jobs      the same name is the same job
    name_notes      which names were used, in the folder
    allowed_images  which images may be sent
    skill           instructions for agents with a shell
    queue_state     what submit prints while the queue is on hold or the daemon is not running
    interrupts      signals, obeyed where submit can report what it has done
    check           what the daemon would do with each file of the inbox
    check_settings  what check prints of configuration, folders, caps, key and account
    check_shared    whether two hosts can process one inbox together
    check_notify    what check prints of notifications
    status          what the daemon is doing
    status_all      what all daemons of a shared account are doing
    metrics         the same for Prometheus
    history         what was completed, refused and spent
    balances        the account's balance before and after a request whose charge is unknown
    estimate        what the prompts in the inbox may cost
    afford          what check prints of caps
    retry           failed prompts back into the inbox
    hold            hold and release
    hosts           the daemons of a shared account; hosts forget removes one
    db              makes and checks the tables of a shared database
    migrate         moves the journal into a shared database, or out of it
    gallery         the page
    demo            six prompts on a local endpoint
    sandbox         the local endpoint
    init            a configuration file
    service         the systemd units of an installation without a checkout
    service_program which program a unit starts, and whether a service can run it
    service_files   the files of a service, and whether they were changed manually
    service_steps   what to run after they were written
    schema          the JSON schemas of the daemon's files
    files           what comes with imagewatch beside its code
    completion      what a shell needs to complete commands
    common          options, and the configuration that they name
    state           the daemon's state folder as commands see it
    ledger          the ledger, opened for a command
    terminal        streams, current folder, tables
"""
