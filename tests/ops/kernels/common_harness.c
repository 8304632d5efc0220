/* common.h: exp and log against libm, the 16-bit storage types against their definition. */

// variants: -DACT=0; -DACT=1; -DACT=2; -DACT=2 -U__F16C__
// variants: -DACT=0 -DVW=16; -DACT=1 -DVW=16; -DACT=2 -DVW=16; -DACT=2 -DVW=16 -U__F16C__
// variants: -DACT=0 -DVW=4; -DACT=1 -DVW=4; -DACT=2 -DVW=4; -DACT=2 -DVW=4 -U__F16C__
// variants: -DACT=0 -DVW=8; -DACT=1 -DVW=8; -DACT=2 -DVW=8

#include <math.h>
#include <stdio.h>

#include "../../../tinyllama/ops/cpu/common.h"

typedef ELEM(ACT) act;

static int failures;

/* Written so that a NaN fails. */
static void check(const char *what, double at, double got, double want, double tolerance) {
  if (got == want || fabs(got - want) <= tolerance) return;
  if (failures++ < 20) printf("%s(%.9g): got %.9g, want %.9g\n", what, at, got, want);
}

static void test_exp_and_log(void) {
  const double ulp = 0x1p-23;
  for (double x = -104; x < 88.7; x += 0.0317) {
    double want = exp((float)x);
    double tolerance = x < -86.9 ? want : 1.5 * ulp * want; /* 0 is allowed from there on */
    check("vexp", x, vexp(vset((float)x))[0], want, tolerance);
    if (x > 0) continue;
    check("vexp_nonpositive", x, vexp_nonpositive(vset((float)x))[VW - 1], want, tolerance);
  }
  for (double x = 0x1p-149; x < 3e38; x *= 1.0173) {
    double want = log((float)x);
    check("vlog", x, vlog(vset((float)x))[0], want, 1.5 * ulp * fabs(want));
  }
  const float inf = INFINITY;
  check("exp(-inf)", 0, vexp(vset(-inf))[0], 0, 0);
  check("exp(inf)", 0, vexp(vset(inf))[0], inf, 0);
  check("exp(88.8)", 0, vexp(vset(88.8f))[0], inf, 0);
  for (int payload = 0; payload < 512; payload++) {
    vf nan = (vf)((vi){0} + (0x7fc00000 | payload));
    check("exp(nan) is nan", payload, isnan(vexp(nan)[0]), 1, 0);
    check("exp(nan) is nan, x <= 0", payload, isnan(vexp_nonpositive(nan)[0]), 1, 0);
  }
  check("exp(-inf), x <= 0", 0, vexp_nonpositive(vset(-inf))[0], 0, 0);
  check("log(0)", 0, log1(0), -inf, 0);
  check("log(inf)", 0, log1(inf), inf, 0);
  check("log(-1) is nan", 0, isnan(log1(-1)), 1, 0);
  check("log(nan) is nan", 0, isnan(log1(NAN)), 1, 0);
}

/* Every 16-bit pattern decodes to its value and back; halfway between two the even one is taken. */
static void test_storage_types(void) {
  const int mantissa = ACT == 1 ? 7 : 10, bias = ACT == 1 ? 127 : 15;
  const unsigned infinite = ACT == 1 ? 0x7f80 : 0x7c00;
  for (unsigned code = 0; ACT && code < 0x8000; code++) {
    act half = (act)code, back, even;
    float value = LOAD1(ACT, &half);
    STORE1(ACT, &back, value);
    if (code > infinite) {
      check("nan stays nan", code, isnan(value) && isnan(LOAD1(ACT, &back)), 1, 0);
      continue;
    }
    int exponent = code >> mantissa, fraction = code & ((1 << mantissa) - 1);
    int whole = fraction + (exponent ? 1 << mantissa : 0);
    double want = ldexp(whole, (exponent ? exponent : 1) - bias - mantissa);
    check("decoded", code, value, code == infinite ? INFINITY : want, 0);
    check("encoded", code, (double)back, code, 0);
    if (code >= infinite - 1) continue;
    half = (act)(code + 1);
    float middle = (float)((value + (double)LOAD1(ACT, &half)) / 2);
    STORE1(ACT, &even, -middle);
    check("halfway", code, (double)even, 0x8000 | ((code + 1) & ~1u), 0);
  }
}

static void test_lanes(void) {
  float lanes[VW], copy[VW + 1];
  for (int i = 0; i < VW; i++) lanes[i] = (float)((i * 5 + 3) % VW + 1);
  check("hsum", 0, hsum(vload(lanes)), VW * (VW + 1) / 2, 0);
  check("hmax", 0, hmax(vload(lanes)), VW, 0);
  for (int n = 0; n <= VW; n++) {
    for (int i = 0; i <= VW; i++) copy[i] = -1;
    STOREN(0, copy, LOADN(0, lanes, n) + 1.0f, n);
    for (int i = 0; i <= VW; i++) check("first n lanes", n, copy[i], i < n ? lanes[i] + 1 : -1, 0);
    vf first = LOADN(0, lanes, n);
    for (int i = n; i < VW; i++) check("lanes beyond n", n, first[i], 0, 0);
  }
  for (int threads = 1; threads <= 5; threads++) {
    check("split begins", threads, (double)split(1000, 16, 0, threads), 0, 0);
    check("split ends", threads, (double)split(1000, 16, threads, threads), 1000, 0);
    check("split in grains", threads, (double)(split(1000, 16, threads / 2, threads) % 16), 0, 0);
  }
}

int main(void) {
  test_exp_and_log();
  test_storage_types();
  test_lanes();
  if (failures) printf("%d wrong\n", failures);
  return failures != 0;
}
