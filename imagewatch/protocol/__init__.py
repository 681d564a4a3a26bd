"""The folder protocol (``docs/reference/``) in code: names, prompts, images, requests, and the values of a job.

It promises that a request is complete and valid before any money is spent, and that everything wrong with dropped files
is reported together. Most modules are pure; ``request`` opens files, with the opener that it is given.

The modules, in reading order::

    names          which file is a prompt, which image belongs to it, who is still writing
    similar_names  for which prompt a file may be meant whose name is almost right
    prompt         the prompt file: encoding, front matter, text
    not_a_prompt   text that is clearly not what should be sent
    options        which options count, which provider is asked, what is sent
    request        dropped files become a valid request
    images         whether an image is whole, and how large
    image_kinds    what a file may be, by its name and its first bytes
    image_reader   reads an image forward; what the walks share
    png            the walk through a PNG
    jpeg           the walk through a JPEG
    webp           the walk through a WebP
    values         what was dropped, the claim, the attempt, the decision: the records of a job
    right_name     which name a file would need to be a prompt
    notice         the status files in the folders, and how a program reads them
    notice_text    the same as text for people
    reasons        what an API response means, and every reason for which the queue is on hold
"""
