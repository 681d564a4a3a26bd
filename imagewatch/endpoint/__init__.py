"""The image API: requests, responses, and the images in them.

It promises that a request counts as not sent only if its sending was seen to fail, that a response is on the disk
before it is read, and that the API key is in no file that other users may read. Nothing in a response is trusted.

The modules, in the order in which they are read::

    api           what statuses and bodies mean: one row of ``protocol/reasons``
    body          the JSON body of a request, in pieces
    client        Client: one request, the balance, downloads
    http_clients  the two HTTP clients
    connection    connections to checked addresses; what of a request has left
    call          how long a call may take, and how much work it may make
    addresses     which IP addresses are public
    receive       a response to the disk while it arrives
    saved_answer  the file of a response: written, read in pieces
    frames        its body, with the images in files of their own
    divider       the images in a body that arrives
    coding        the content coding of a response
    decode        a paid response into images
    splitter      the images in a response, apart from the rest of its JSON
    without_key   what other users may see of a response
    download      images by URL
    pictures      the images of a paid response: decoded, downloaded, checked
"""
