"""The program's commands, a file for each group of verbs: names, defaults, help and printing around the library.

A command is a function: its signature is the options, and its docstring what ``composer-megatron COMMAND --help``
shows. `composer_megatron.cli.COMMANDS` lists them. Heavy packages are imported inside the command that needs them, so
that the program starts at once.
"""
