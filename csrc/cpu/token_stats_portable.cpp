// token_stats without any assumption about the processor: SSE2, NEON or scalar code, as the compiler's target has it.
#define DQO_LANES 4
#include "cpu/token_stats_rows.h"

DQO_TOKEN_STATS_ROWS(token_stats_portable)
