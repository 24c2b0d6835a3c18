"""Errors that the user can mend: one line each, with the exit code that the process leaves with."""

LONGEST_SHOWN = 200  # characters of a value


def shown(value: object) -> str:
    """A value that anybody may have written into a file, as it can stand in a line: on a terminal it moves nothing, and it has an end."""
    text = str(value)
    text = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class UserError(Exception):
    """A mistake outside the program; its message is one line saying what to change.

    Programming errors are not `UserError`s and keep their traceback.
    """

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that cannot be honoured: names the key, what was given and what is allowed."""

    exit_code = 2


class ConfigNotFoundError(ConfigError, FileNotFoundError):
    """A configuration file that does not exist; the message names those that do."""

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(UserError):
    """Footage or labels that cannot be used: names the file and, where there is one, the line."""
