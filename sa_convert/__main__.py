"""`python -m sa_convert` is `sa-convert`."""

from sa_convert.commands.main import main

main()
