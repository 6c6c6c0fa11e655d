# SPDX-License-Identifier: Apache-2.0
"""`python -m fastprompt.demo`."""

from . import main

raise SystemExit(main())
