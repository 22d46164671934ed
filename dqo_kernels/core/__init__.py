"""What every operation is built on: checks of arguments, the choice of a backend, registration with torch, packed rows.

Modules here import each other and torch, never an operation; `library.run` finds an operation's backend by its name.
"""
