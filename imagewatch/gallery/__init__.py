"""``imagewatch gallery``: one page of what was completed, what it cost, and what failed.

It reads the outbox, the errors folder and the archive, and changes nothing in them. Everything that it reads may have
been written by others: nothing of it becomes markup, no link is followed, and only a separate process decodes images.
The page is beside the outbox and never in it, as other tools move, sync and count what is in there. Its thumbnails are
in a folder beside the page that has its name and ``_files`` at the end, as browsers do when they save a page.

Who keeps the promise about what others wrote::

    page             texts are data, and the page may load nothing from elsewhere (inert, _policy)
    result_files     types and lengths of what a receipt says (ResultFile, cut)
    jobs             how much is read (Reader)
    status           how much of the daemon's status is shown; its size and types: protocol.notice
    folders          an image is a plain file of the receipt's folder, with the size in it (Tree.image)
    decoder, shrink  a process without rights, with little memory and time (Decoder.shrink, _confine)

The modules, in reading order::

    writer        Gallery: which page is due, and all that is written; keep_fresh
    jobs          the folders become jobs
    result_files  what a receipt or error file says
    folders       one folder with all below it, during one scan
    status        what the daemon reports at the top of the page
    values        a job and its images, and the status, as the page gets them
    page          page.html, page.css, page.js and the jobs become one file
    thumbnails    small copies of images, a cache
    decoder       the process that decodes images, as its parent sees it
    shrink        the program of that process
    rights        whose rights root works with
"""

from imagewatch.gallery.writer import Gallery, Written, keep_fresh

__all__ = ["Gallery", "Written", "keep_fresh"]
