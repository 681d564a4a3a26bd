"""Notifications: events of the journal, delivered to a command or a URL.

It promises that an event is delivered at least once or reported as failed after seven days. No job waits for it, and no
receiver gets the API key or a header of the API's client.

The modules, in the order in which they are read::

    notifier  Notifier: the thread that delivers, one event after the other
    payload   an event as the JSON that receivers get
    command   a receiver that is a program
    post      a receiver that has a URL
    secret    the secret that signs what is posted
"""
