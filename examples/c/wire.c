#define _POSIX_C_SOURCE 200809L
#include "wire.h"

#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

static void *must(void *memory) {
    if (!memory) abort();
    return memory;
}

/* ---- msgpack ---- */

static void put(Pack *p, const void *data, size_t n) {
    if (p->n + n > p->room) p->data = must(realloc(p->data, p->room = 2 * (p->n + n)));
    if (n) memcpy(p->data + p->n, data, n);
    p->n += n;
}

static void put_be(Pack *p, int tag, uint64_t value, int bytes) {
    unsigned char out[9] = {(unsigned char)tag};
    for (int i = 0; i < bytes; i++) out[1 + i] = (unsigned char)(value >> 8 * (bytes - 1 - i));
    put(p, out, (size_t)bytes + 1);
}

void pack_map(Pack *p, int pairs) { pairs < 16 ? put_be(p, 0x80 | pairs, 0, 0) : put_be(p, 0xde, (uint64_t)pairs, 2); }
void pack_array(Pack *p, int items) { items < 16 ? put_be(p, 0x90 | items, 0, 0) : put_be(p, 0xdc, (uint64_t)items, 2); }
void pack_bool(Pack *p, int value) { put_be(p, value ? 0xc3 : 0xc2, 0, 0); }
void pack_nil(Pack *p) { put_be(p, 0xc0, 0, 0); }

void pack_str(Pack *p, const char *text) {
    size_t n = strlen(text);
    if (n < 32) put_be(p, 0xa0 | (int)n, 0, 0);
    else if (n < 256) put_be(p, 0xd9, n, 1);
    else put_be(p, 0xda, n, 2);
    put(p, text, n);
}

void pack_bin(Pack *p, const void *data, size_t n) {
    if (n < 256) put_be(p, 0xc4, n, 1);
    else put_be(p, 0xc6, n, 4);
    put(p, data, n);
}

void pack_int(Pack *p, long long value) {
    if (value < 128) put_be(p, (int)value, 0, 0);
    else if (value < 256) put_be(p, 0xcc, (uint64_t)value, 1);
    else if (value < 65536) put_be(p, 0xcd, (uint64_t)value, 2);
    else if (value < 4294967296LL) put_be(p, 0xce, (uint64_t)value, 4);
    else put_be(p, 0xcf, (uint64_t)value, 8);
}

void pack_double(Pack *p, double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    put_be(p, 0xcb, bits, 8);
}

typedef struct { const unsigned char *at, *end; int bad; } Reader;

static uint64_t take_be(Reader *r, int bytes) {
    uint64_t value = 0;
    if (r->end - r->at < bytes) { r->bad = 1; return 0; }
    for (int i = 0; i < bytes; i++) value = value << 8 | *r->at++;
    return value;
}

static void read_item(Reader *r, Item *item, int depth);

static void read_text(Reader *r, Item *item, char kind, uint64_t n) {
    if ((uint64_t)(r->end - r->at) < n) { r->bad = 1; return; }
    item->kind = kind, item->n = (int)n;
    item->text = must(malloc(n + 1));
    memcpy(item->text, r->at, n);
    item->text[n] = 0;
    r->at += n;
}

static void read_items(Reader *r, Item *item, char kind, uint64_t n, int depth) {
    uint64_t children = kind == 'm' ? 2 * n : n;
    if (depth > 16 || children > (uint64_t)(r->end - r->at)) { r->bad = 1; return; } /* each takes a byte at least */
    item->kind = kind, item->n = (int)n;
    item->items = must(calloc(children + 1, sizeof *item->items));
    for (uint64_t i = 0; i < children && !r->bad; i++) read_item(r, &item->items[i], depth + 1);
}

static void read_item(Reader *r, Item *item, int depth) {
    unsigned tag = (unsigned)take_be(r, 1);
    item->kind = '0';
    if (r->bad) return;
    if (tag < 0x80) item->kind = 'i', item->integer = tag;
    else if (tag < 0x90) read_items(r, item, 'm', tag & 15, depth);
    else if (tag < 0xa0) read_items(r, item, 'a', tag & 15, depth);
    else if (tag < 0xc0) read_text(r, item, 's', tag & 31);
    else if (tag == 0xc0) return;
    else if (tag == 0xc2 || tag == 0xc3) item->kind = 'b', item->integer = tag & 1;
    else if (tag >= 0xc4 && tag <= 0xc6) read_text(r, item, 'x', take_be(r, 1 << (tag - 0xc4)));
    else if (tag == 0xcb) {
        uint64_t bits = take_be(r, 8);
        item->kind = 'd';
        memcpy(&item->number, &bits, 8);
    } else if (tag >= 0xcc && tag <= 0xcf) item->kind = 'i', item->integer = (long long)take_be(r, 1 << (tag - 0xcc));
    else if (tag == 0xd0) item->kind = 'i', item->integer = (int8_t)take_be(r, 1);
    else if (tag == 0xd1) item->kind = 'i', item->integer = (int16_t)take_be(r, 2);
    else if (tag == 0xd2) item->kind = 'i', item->integer = (int32_t)take_be(r, 4);
    else if (tag == 0xd3) item->kind = 'i', item->integer = (int64_t)take_be(r, 8);
    else if (tag >= 0xd9 && tag <= 0xdb) read_text(r, item, 's', take_be(r, 1 << (tag - 0xd9)));
    else if (tag == 0xdc || tag == 0xdd) read_items(r, item, 'a', take_be(r, tag == 0xdc ? 2 : 4), depth);
    else if (tag == 0xde || tag == 0xdf) read_items(r, item, 'm', take_be(r, tag == 0xde ? 2 : 4), depth);
    else if (tag >= 0xe0) item->kind = 'i', item->integer = (int8_t)tag;
    else r->bad = 1;
}

Item *unpack(const char *data, size_t n) {
    Reader r = {(const unsigned char *)data, (const unsigned char *)data + n, 0};
    Item *item = must(calloc(1, sizeof *item));
    read_item(&r, item, 0);
    if (!r.bad && r.at == r.end) return item;
    item_free(item);
    return NULL;
}

const Item *map_get(const Item *map, const char *name) {
    for (int i = 0; map->kind == 'm' && i < map->n; i++)
        if (map->items[2 * i].kind == 's' && !strcmp(map->items[2 * i].text, name)) return &map->items[2 * i + 1];
    return NULL;
}

static void item_clear(Item *item) {
    int children = item->items ? (item->kind == 'm' ? 2 : 1) * item->n : 0;
    for (int i = 0; i < children; i++) item_clear(&item->items[i]);
    free(item->items);
    free(item->text);
}

void item_free(Item *item) {
    if (item) item_clear(item);
    free(item);
}

/* ---- Redis ---- */

int redis_connect(Redis *r, const char *address) {
    redis_close(r);
    if (!strncmp(address, "unix:", 5)) {
        struct sockaddr_un name = {.sun_family = AF_UNIX};
        snprintf(name.sun_path, sizeof name.sun_path, "%s", address + 5);
        r->fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (r->fd >= 0 && connect(r->fd, (struct sockaddr *)&name, sizeof name)) redis_close(r);
    } else {
        char host[256];
        snprintf(host, sizeof host, "%s", address);
        char *port = strrchr(host, ':');
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
        if (!port) return 0;
        *port++ = 0;
        if (getaddrinfo(host, port, &hints, &found)) return 0;
        r->fd = socket(found->ai_family, SOCK_STREAM, 0);
        if (r->fd >= 0 && connect(r->fd, found->ai_addr, found->ai_addrlen)) redis_close(r);
        freeaddrinfo(found);
    }
    if (r->fd < 0) return 0;
    struct timeval limit = {10, 0};
    setsockopt(r->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(r->fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    return 1;
}

void redis_close(Redis *r) {
    if (r->fd >= 0) close(r->fd);
    r->fd = -1;
    r->at = r->end = 0;
    value_free(r->last);
    r->last = NULL;
}

static int push(Redis *r, const char *data, size_t n) {
    while (n) {
        ssize_t wrote = send(r->fd, data, n, MSG_NOSIGNAL);
        if (wrote <= 0) return 0;
        data += wrote, n -= (size_t)wrote;
    }
    return 1;
}

static int pull(Redis *r, char *to, size_t n) {
    while (n) {
        if (r->at == r->end) {
            ssize_t got = recv(r->fd, r->buffer, sizeof r->buffer, 0);
            if (got <= 0) return 0;
            r->at = 0, r->end = (size_t)got;
        }
        size_t part = r->end - r->at < n ? r->end - r->at : n;
        memcpy(to, r->buffer + r->at, part);
        r->at += part, to += part, n -= part;
    }
    return 1;
}

static int pull_line(Redis *r, char *line, size_t most) {
    for (size_t n = 0; n + 1 < most; n++) {
        if (!pull(r, line + n, 1)) return 0;
        if (n && line[n - 1] == '\r' && line[n] == '\n') return line[n - 1] = 0, 1;
    }
    return 0;
}

static Value *pull_value(Redis *r) {
    char line[1024];
    if (!pull_line(r, line, sizeof line)) return NULL;
    Value *value = must(calloc(1, sizeof *value));
    value->kind = line[0];
    int ok = 1;
    if (line[0] == '$' && atoll(line + 1) >= 0) {
        char rest[2];
        value->n = atoll(line + 1);
        value->text = must(calloc((size_t)value->n + 1, 1));
        ok = pull(r, value->text, (size_t)value->n) && pull(r, rest, 2);
    } else if (line[0] == '*' && atoll(line + 1) >= 0) {
        long long n = atoll(line + 1);
        value->items = must(calloc((size_t)n + 1, sizeof *value->items));
        while (ok && value->n < n) ok = (value->items[value->n] = pull_value(r)) != NULL && ++value->n;
    } else if (line[0] == '$' || line[0] == '*') value->kind = '_';
    else value->text = must(strdup(line + 1));
    if (ok) return value;
    value_free(value);
    return NULL;
}

void value_free(Value *value) {
    if (!value) return;
    for (long long i = 0; value->items && i < value->n; i++) value_free(value->items[i]);
    free(value->items);
    free(value->text);
    free(value);
}

Value *value_keep(Redis *r, Value *value) {
    r->last = NULL;
    return value;
}

Value *redis_call_n(Redis *r, int n, const char **args, const size_t *lengths) {
    char line[48];
    value_free(r->last);
    r->last = NULL;
    if (r->fd < 0) return NULL;
    int ok = push(r, line, (size_t)snprintf(line, sizeof line, "*%d\r\n", n));
    for (int i = 0; i < n && ok; i++)
        ok = push(r, line, (size_t)snprintf(line, sizeof line, "$%zu\r\n", lengths[i])) && push(r, args[i], lengths[i]) && push(r, "\r\n", 2);
    return r->last = ok ? pull_value(r) : NULL;
}

Value *redis_call(Redis *r, int n, const char **args) {
    size_t lengths[16];
    for (int i = 0; i < n; i++) lengths[i] = strlen(args[i]);
    return redis_call_n(r, n, args, lengths);
}

/* ---- digests ---- */

void put_le32(unsigned char *to, uint32_t value) {
    for (int i = 0; i < 4; i++) to[i] = (unsigned char)(value >> 8 * i);
}

uint32_t crc32_of(const void *data, size_t n) {
    const unsigned char *at = data;
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        crc ^= at[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return ~crc;
}

typedef struct { uint32_t h[8]; uint64_t bytes; unsigned char block[64]; } Sha;

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha_block(Sha *s) {
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++) w[i] = (uint32_t)s->block[4 * i] << 24 | (uint32_t)s->block[4 * i + 1] << 16 | (uint32_t)s->block[4 * i + 2] << 8 | s->block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + w[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
    }
    memcpy(v, s->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t one = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
        uint32_t two = (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
    for (int i = 0; i < 8; i++) s->h[i] += v[i];
}

static void sha_add(Sha *s, const void *data, size_t n) {
    const unsigned char *at = data;
    while (n) {
        size_t have = s->bytes % 64, part = 64 - have < n ? 64 - have : n;
        memcpy(s->block + have, at, part);
        s->bytes += part, at += part, n -= part;
        if (s->bytes % 64 == 0) sha_block(s);
    }
}

static Sha sha_new(void) {
    return (Sha){.h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
}

static void sha_end(Sha *s, unsigned char digest[32]) {
    uint64_t bits = s->bytes * 8;
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)(bits >> 8 * (7 - i));
    sha_add(s, "\x80", 1);
    while (s->bytes % 64 != 56) sha_add(s, "", 1);
    sha_add(s, length, 8);
    for (int i = 0; i < 32; i++) digest[i] = (unsigned char)(s->h[i / 4] >> 8 * (3 - i % 4));
}

void sha256(unsigned char digest[32], int parts, const void *const *data, const size_t *n) {
    Sha s = sha_new();
    for (int i = 0; i < parts; i++) sha_add(&s, data[i], n[i]);
    sha_end(&s, digest);
}

/* ---- drafts ---- */

static char *read_file(const char *directory, const char *name, size_t *n) {
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s", directory, name) >= (int)sizeof path) return NULL;
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    char *data = NULL;
    if (!fseek(file, 0, SEEK_END)) {
        long size = ftell(file);
        rewind(file);
        data = size >= 0 ? must(malloc((size_t)size + 1)) : NULL;
        if (data && fread(data, 1, (size_t)size, file) != (size_t)size) free(data), data = NULL;
        if (data) data[size] = 0, *n = (size_t)size;
    }
    fclose(file);
    return data;
}

static void put_le64(unsigned char *to, uint64_t value) { put_le32(to, (uint32_t)value), put_le32(to + 4, (uint32_t)(value >> 32)); }

static void to_hex(char out[65], const unsigned char digest[32]) {
    for (int i = 0; i < 32; i++) snprintf(out + 2 * i, 3, "%02x", digest[i]);
}

/* Where the tensor d2t lies; safetensors: 8 bytes length, that much JSON, then the data. */
static int find_d2t(const char *data, size_t n, size_t *at, size_t *bytes) {
    uint64_t length = 0;
    unsigned long long first, last;
    for (int i = 7; i >= 0 && n >= 8; i--) length = length << 8 | (unsigned char)data[i];
    if (n < 8 || length > n - 8 || length > 65536) return 0;
    char header[65537];
    memcpy(header, data + 8, length);
    header[length] = 0;
    const char *entry = strstr(header, "\"d2t\""), *offsets = entry ? strstr(entry, "\"data_offsets\"") : NULL;
    if (!offsets || sscanf(offsets + 14, " : [ %llu , %llu ]", &first, &last) != 2 || first > last || last > n - 8 - length) return 0;
    *at = 8 + length + first, *bytes = last - first;
    return 1;
}

int draft_identity(const char *directory, char version[65], char vocab[65]) {
    size_t config_n = 0, weights_n = 0, at = 0, bytes = 0;
    char *config = read_file(directory, "config.json", &config_n), *weights = read_file(directory, "model.safetensors", &weights_n);
    const char *size = config ? strstr(config, "\"vocab_size\"") : NULL;
    unsigned long long tokens;
    int ok = weights && size && sscanf(size + 12, " : %llu", &tokens) == 1 && find_d2t(weights, weights_n, &at, &bytes);
    if (ok) {
        unsigned char prefix[8], digest[32];
        put_le64(prefix, config_n);
        sha256(digest, 3, (const void *[]){prefix, config, weights}, (size_t[]){8, config_n, weights_n});
        to_hex(version, digest);
        put_le64(prefix, tokens);
        sha256(digest, 2, (const void *[]){prefix, weights + at}, (size_t[]){8, bytes});
        to_hex(vocab, digest);
    }
    free(config);
    free(weights);
    return ok;
}
