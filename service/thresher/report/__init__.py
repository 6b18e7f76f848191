"""The report: a finished run directory as one page for people, that needs no network and no script.

`read` gathers the files, `verdict` says what came out, `figures` draws, `page` puts it together.
"""
