// token_stats for x86-64 with AVX2, FMA and F16C; compiled with the flags that setup.py names.
#if defined(__x86_64__)
#define DQO_LANES 8
#include "cpu/token_stats_rows.h"

DQO_TOKEN_STATS_ROWS(token_stats_avx2)
#endif
