/* Colour, blur, flips and normalisation of whole views: the results of torch_ops.py, bit for bit.

   S side of a view · n pixels of a tile · planes are float32 (3, S, S) with values in [0, 1]

   A view is computed a tile of a few rows at a time, which stays in the first-level cache from the load of its bytes to
   the store of its values. Contrast needs the mean of the whole view, and blur needs the rows above and below: such
   views pass through planes of their full size. Every sum is rounded as it is written (-ffp-contract=off), so that the
   results are those of torch and the same on every processor. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { FLIP, ORDER, FACTORS, GREY = FACTORS + 4, BLUR_SIGMA, SOLARISE, VERTICAL_FLIP, COLUMNS }; /* params.Column */
enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };                                                  /* params.Op */
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { TILE = 1024, LANES = 8 };
#define LEVELS 16777216.0 /* of the luma, in its mean */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* What all views of a batch share: the fields of c_ops.Batch, which explains them. */
typedef struct {
    const uint8_t *crops;
    int64_t stride_view, stride_row, stride_column, stride_channel;
    const int64_t *source;
    const float *params, *weights, *scale, *offset;
    void *out;
    int32_t side, radius, dtype, grey_first;
} batch;

/* Memory of one thread. */
typedef struct {
    float *tile;   /* (3, rows, S), a tile of at most TILE pixels or one row */
    float *planes; /* (3, S + 2 · radius, S): whole planes with rows above and below */
    float *row;    /* (S + 2 · radius,) */
    int rows;
} scratch;

/* Some rows of the three planes. */
typedef struct {
    float *restrict red, *restrict green, *restrict blue;
} tile;

static tile tile_at(float *planes, int64_t plane) { return (tile){planes, planes + plane, planes + 2 * plane}; }

static inline float clip(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

static inline float luma(float red, float green, float blue) { return 0.2989f * red + 0.587f * green + 0.114f * blue; }

/* ---- bytes to planes ---------------------------------------------------------------------------------------------- */

/* One row of pixels; compilers vectorise it if the strides are constants. */
static inline __attribute__((always_inline)) void load_pixels(
    const uint8_t *bytes, int64_t column, int64_t channel, tile to, int n) {
    const float unit = (float)(1.0 / 255);
    for (int i = 0; i < n; i++) {
        to.red[i] = bytes[i * column] * unit;
        to.green[i] = bytes[i * column + channel] * unit;
        to.blue[i] = bytes[i * column + 2 * channel] * unit;
    }
}

static void load_row(const batch *b, const uint8_t *row, tile to) {
    int64_t column = b->stride_column, channel = b->stride_channel;
    if (column == 3 && channel == 1)
        load_pixels(row, 3, 1, to, b->side);
    else if (column == 1)
        load_pixels(row, 1, channel, to, b->side);
    else
        load_pixels(row, column, channel, to, b->side);
}

static void reverse(float *restrict row, float *restrict copy, int n) {
    memcpy(copy, row, n * sizeof(float));
    for (int i = 0; i < n; i++) row[i] = copy[n - 1 - i];
}

/* Rows `first` to `first + rows` - 1 of a view, flipped. */
static void load(const batch *b, const scratch *s, int64_t view, int first, int rows, tile to) {
    const float *params = b->params + view * COLUMNS;
    const uint8_t *crop = b->crops + b->source[view] * b->stride_view;
    for (int y = first; y < first + rows; y++) {
        int from = params[VERTICAL_FLIP] != 0 ? b->side - 1 - y : y;
        load_row(b, crop + from * b->stride_row, to);
        float *planes[] = {to.red, to.green, to.blue};
        for (int channel = 0; channel < 3 && params[FLIP] != 0; channel++) reverse(planes[channel], s->row, b->side);
        to.red += b->side, to.green += b->side, to.blue += b->side;
    }
}

/* ---- colour ------------------------------------------------------------------------------------------------------- */

static void scale_and_clip(float *restrict plane, float factor, float offset, int n) {
    for (int i = 0; i < n; i++) plane[i] = clip(plane[i] * factor + offset, 0, 1);
}

static void saturate(tile t, float factor, int n) {
    float rest = 1 - factor;
    for (int i = 0; i < n; i++) {
        float grey = luma(t.red[i], t.green[i], t.blue[i]) * rest;
        t.red[i] = clip(t.red[i] * factor + grey, 0, 1);
        t.green[i] = clip(t.green[i] * factor + grey, 0, 1);
        t.blue[i] = clip(t.blue[i] * factor + grey, 0, 1);
    }
}

/* The hue opposite a channel's own, minus the shift, within half a circle of length 6. */
static float opposite_hue(float shift, float opposite) {
    float distance = 6 * shift - opposite;
    return distance - 6 * rintf(distance / 6);
}

static inline float rotated(float hue, float opposite, float highest, float chroma) {
    return highest - clip(fabsf(fabsf(hue + opposite) - 3), 1, 2) * chroma;
}

static void rotate_hue(tile t, float shift, int n) {
    float of_red = opposite_hue(shift, 3), of_green = opposite_hue(shift, 5), of_blue = opposite_hue(shift, 7);
    for (int i = 0; i < n; i++) {
        float red = t.red[i], green = t.green[i], blue = t.blue[i];
        float largest = red > green ? red : green, smallest = red < green ? red : green;
        largest = largest > blue ? largest : blue;
        smallest = smallest < blue ? smallest : blue;
        float chroma = largest - smallest;
        float hue = (green + blue - red - smallest) / (chroma < 1e-12f ? 1e-12f : chroma) + 1;
        hue = copysignf(hue, green - blue);
        float highest = smallest + 2 * chroma;
        t.red[i] = rotated(hue, of_red, highest, chroma);
        t.green[i] = rotated(hue, of_green, highest, chroma);
        t.blue[i] = rotated(hue, of_blue, highest, chroma);
    }
}

static void to_grey(tile t, int n) {
    for (int i = 0; i < n; i++) t.red[i] = t.green[i] = t.blue[i] = luma(t.red[i], t.green[i], t.blue[i]);
}

/* Sum of the luma in units of 1 / LEVELS: of integers, so that it does not depend on their order. */
static int64_t luma_sum(tile t, int n) {
    int64_t sum = 0;
    for (int i = 0; i < n; i++) sum += (int32_t)(luma(t.red[i], t.green[i], t.blue[i]) * (float)LEVELS);
    return sum;
}

/* The operations of the view's order at positions `first` to `last` - 1. */
static void jitter(tile t, const float *row, int first, int last, float mean, int n) {
    for (int position = first; position < last; position++) {
        int op = ((int)row[ORDER] >> 2 * position) & 3;
        float factor = row[FACTORS + op];
        if (op == SATURATION) saturate(t, factor, n);
        if (op == HUE) rotate_hue(t, factor, n);
        if (op == SATURATION || op == HUE) continue;
        float *planes[] = {t.red, t.green, t.blue}, offset = op == CONTRAST ? mean * (1 - factor) : 0;
        for (int channel = 0; channel < 3; channel++) scale_and_clip(planes[channel], factor, offset, n);
    }
}

static int is_jittered(const float *row) {
    const float *factors = row + FACTORS;
    return factors[BRIGHTNESS] != 1 || factors[CONTRAST] != 1 || factors[SATURATION] != 1 || factors[HUE] != 0;
}

static int position_of(int op, const float *row) {
    int position = 0;
    while (position < 4 && ((int)row[ORDER] >> 2 * position & 3) != op) position++;
    return position;
}

/* ---- blur --------------------------------------------------------------------------------------------------------- */

/* out[i] = weights[0] · in[i] + Σ_k weights[k] · (in[i - k · step] + in[i + k · step]), in the order of k. */
static inline void blur_pixel(const float *in, int64_t step, const float *weights, int radius, float *out) {
    float sum = weights[0] * *in;
    for (int k = 1; k <= radius; k++) sum += weights[k] * (in[-k * step] + in[k * step]);
    *out = sum;
}

static inline void blur_lanes(const float *in, int64_t step, const float *weights, int radius, float *out) {
    const lanes *at = (const lanes *)in;
    lanes sum0 = weights[0] * at[0], sum1 = weights[0] * at[1];
    for (int k = 1; k <= radius; k++) {
        const lanes *before = (const lanes *)(in - k * step), *after = (const lanes *)(in + k * step);
        sum0 += weights[k] * (before[0] + after[0]);
        sum1 += weights[k] * (before[1] + after[1]);
    }
    ((lanes *)out)[0] = sum0, ((lanes *)out)[1] = sum1;
}

static void blur_sums(const float *in, int64_t step, const float *weights, int radius, float *out, int n) {
    int i = 0;
    while (radius > 0 && weights[radius] == 0) radius--;
    for (; i + 2 * LANES <= n; i += 2 * LANES) blur_lanes(in + i, step, weights, radius, out + i);
    for (; i < n; i++) blur_pixel(in + i, step, weights, radius, out + i);
}

/* Blurs along each of some rows, in place. */
static void blur_rows(float *row, const float *weights, int radius, int side, int rows, float *padded) {
    float *in = padded + radius;
    for (; rows--; row += side) {
        memcpy(in, row, side * sizeof(float));
        for (int k = 1; k <= radius; k++) in[-k] = row[k], in[side - 1 + k] = row[side - 1 - k];
        blur_sums(in, 1, weights, radius, row, side);
    }
}

/* Rows above the first and below the last one, by reflection. */
static void pad_rows(float *plane, int radius, int side) {
    size_t bytes = side * sizeof(float);
    float *last = plane + (int64_t)(side - 1) * side;
    for (int64_t k = 1; k <= radius; k++) {
        memcpy(plane - k * side, plane + k * side, bytes);
        memcpy(last + k * side, last - k * side, bytes);
    }
}

/* ---- planes to values --------------------------------------------------------------------------------------------- */

static void solarise(float *plane, int n) {
    for (int i = 0; i < n; i++) plane[i] = plane[i] >= 0.5f ? 1 - plane[i] : plane[i];
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline uint16_t to_float16(float x) {
    uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    uint32_t rebiased = magnitude - (112u << 23);
    uint32_t normal = (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13;
    uint32_t subnormal = bits_of(fabsf(x) + 0.5f) - bits_of(0.5f); /* in units of 2^-24 */
    uint32_t half = magnitude < 0x38800000 ? subnormal : magnitude < 0x47800000 ? normal : 0x7c00;
    return (bits >> 16 & 0x8000) | half;
}

static inline __attribute__((always_inline)) void store_rounded(
    tile t, uint16_t (*round)(float), uint16_t *restrict out, int n) {
    for (int i = 0; i < n; i++) {
        out[3 * i] = round(t.red[i]);
        out[3 * i + 1] = round(t.green[i]);
        out[3 * i + 2] = round(t.blue[i]);
    }
}

/* Solarise, normalise and store, from pixel `pixel` of the batch on. */
static void finish(const batch *b, tile t, int solarised, int64_t pixel, int n) {
    float *planes[] = {t.red, t.green, t.blue};
    for (int channel = 0; channel < 3; channel++) {
        if (solarised) solarise(planes[channel], n);
        float *restrict plane = planes[channel], scale = b->scale[channel], offset = b->offset[channel];
        for (int i = 0; i < n; i++) plane[i] = plane[i] * scale + offset;
    }
    if (b->dtype == FLOAT32) {
        float *restrict out = (float *)b->out + 3 * pixel;
        for (int i = 0; i < n; i++) out[3 * i] = t.red[i], out[3 * i + 1] = t.green[i], out[3 * i + 2] = t.blue[i];
        return;
    }
    uint16_t *out = (uint16_t *)b->out + 3 * pixel;
    if (b->dtype == BFLOAT16) store_rounded(t, to_bfloat16, out, n);
    if (b->dtype == FLOAT16) store_rounded(t, to_float16, out, n);
}

/* ---- a view ------------------------------------------------------------------------------------------------------- */

static void compute_view(const batch *b, const scratch *s, int64_t view) {
    const float *params = b->params + view * COLUMNS, *weights = b->weights + view * (b->radius + 1);
    int side = b->side, radius = b->radius;
    int grey = params[GREY] != 0, blurred = params[BLUR_SIGMA] > 0, jittered = is_jittered(params);
    int contrast = position_of(CONTRAST, params);
    int64_t pixels = (int64_t)side * side, plane = pixels + 2 * (int64_t)radius * side;
    float *whole = s->planes + (int64_t)radius * side, mean = 0;
    if (jittered) {
        int64_t sum = 0;
        for (int y = 0; y < side; y += s->rows) {
            int rows = y + s->rows < side ? s->rows : side - y, n = rows * side;
            tile t = tile_at(whole + (int64_t)y * side, plane);
            load(b, s, view, y, rows, t);
            if (grey && b->grey_first) to_grey(t, n);
            jitter(t, params, 0, contrast, 0, n);
            sum += luma_sum(t, n);
        }
        mean = (float)((double)sum / (LEVELS * (double)pixels));
    }
    for (int y = 0; y < side; y += s->rows) {
        int rows = y + s->rows < side ? s->rows : side - y, n = rows * side;
        tile t = jittered || blurred ? tile_at(whole + (int64_t)y * side, plane) : tile_at(s->tile, s->rows * side);
        if (jittered)
            jitter(t, params, contrast, 4, mean, n);
        else {
            load(b, s, view, y, rows, t);
            if (grey && b->grey_first) to_grey(t, n);
        }
        if (grey && !b->grey_first) to_grey(t, n);
        if (blurred)
            for (int channel = 0; channel < 3; channel++)
                blur_rows(t.red + channel * plane, weights, radius, side, rows, s->row);
        else
            finish(b, t, params[SOLARISE] != 0, view * pixels + (int64_t)y * side, n);
    }
    if (!blurred) return;
    for (int channel = 0; channel < 3; channel++) pad_rows(whole + channel * plane, radius, side);
    for (int y = 0; y < side; y += s->rows) {
        int rows = y + s->rows < side ? s->rows : side - y, n = rows * side;
        for (int channel = 0; channel < 3; channel++) {
            const float *in = whole + channel * plane + (int64_t)y * side;
            blur_sums(in, side, weights, radius, s->tile + channel * s->rows * side, n);
        }
        finish(b, tile_at(s->tile, s->rows * side), params[SOLARISE] != 0, view * pixels + (int64_t)y * side, n);
    }
}

/* Number of floats of the memory that `compute_views` needs. */
int64_t scratch_floats(const batch *b) {
    int64_t padded = b->side + 2 * (int64_t)b->radius;
    return 3 * (int64_t)(b->side > TILE ? b->side : TILE) + 3 * padded * b->side + padded;
}

/* Views `first` to `last` - 1. */
void compute_views(const batch *b, int64_t first, int64_t last, float *memory) {
    int rows = b->side > TILE ? 1 : TILE / b->side;
    int64_t padded = b->side + 2 * (int64_t)b->radius;
    float *planes = memory + 3 * (int64_t)rows * b->side, *row = planes + 3 * padded * b->side;
    scratch s = {memory, planes, row, rows};
    for (int64_t view = first; view < last; view++) compute_view(b, &s, view);
}
