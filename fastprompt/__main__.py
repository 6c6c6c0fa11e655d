# SPDX-License-Identifier: Apache-2.0
"""`python -m fastprompt`."""

from .cli import main

raise SystemExit(main())
