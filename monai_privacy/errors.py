# Copyright (c) monai_privacy contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""One clear line for what a user can mend; the whole traceback for what only we can."""

from __future__ import annotations

from monai_privacy.accounting.ledger_file import LedgerError
from monai_privacy.accounting.values import PrivacyBudgetError

# What bad input raises in this package, and the system's own words about files.
_USER_ERRORS = (ValueError, OSError, LedgerError, PrivacyBudgetError)


def user_message(error: BaseException) -> str | None:
    """The one line to show for ``error``, or None where it is a fault of the program.

    MONAI's config parser and transforms wrap the error that says what is wrong in a RuntimeError: that one is passed
    over. Below the error that is shown lie only its own causes.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    told = next((link for link in chain if isinstance(link, _USER_ERRORS)), None)
    if told is None:
        return None
    if isinstance(told, OSError) and told.strerror:
        return f"{told.filename or 'file'}: {told.strerror}. Check the path and its permissions."
    return " ".join(str(told).split()) or type(told).__name__
