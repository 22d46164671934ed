// token_stats for x86-64 with AVX-512 F, BW, DQ and VL; compiled with the flags that setup.py names.
#if defined(__x86_64__)
#define DQO_LANES 16
#include "cpu/token_stats_rows.h"

DQO_TOKEN_STATS_ROWS(token_stats_avx512)
#endif
