"""``python -m server.models.gguf FILE FOLDER``: a GGUF file to a Hugging Face folder.

Prints ``FRACTION STAGE`` lines; for failures see ``server.models.conversions``.
"""

from server.models.gguf.conversion import main

if __name__ == "__main__":
    main()
