"""The built-in demo, which `privfl init` copies as a starter: nothing here knows more of privfl
than a user's own files.
"""
