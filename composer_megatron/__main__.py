"""``python -m composer_megatron``: the same program as the console script ``composer-megatron``."""

from composer_megatron.cli import main

if __name__ == "__main__":
    main()
